"""AlpacaEval 2 (Fig. 5): answers in the benchmark's form, a judge that compares them, win rates with intervals."""
