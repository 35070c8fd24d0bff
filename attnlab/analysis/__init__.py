"""What attention does, measured on queries, keys and a rule, or on a trained run."""
