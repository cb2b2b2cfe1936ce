"""What a policy achieves: rewards, the objective, fronts, dominance and control (section 3.2)."""
