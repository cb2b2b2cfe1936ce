"""A small world with known rewards: prompts, answers, raters and the best reachable front.

Read in this order: `language` (questions and answers), `truth` (the true rewards of an answer),
`optimum` (the best answer for every direction), `people` (writers and raters), `corpus` (the base model's text),
`base` (the base model itself).
"""
