"""A small world with known rewards: prompts, answers, raters and the best reachable front.

Read in this order: `language` (what can be asked and said), `truth` (the true rewards of an answer),
`optimum` (the best answer for every direction), `people` (who writes the answers and who rates them),
`corpus` (what the base model reads), `base` (the base model itself).
"""
