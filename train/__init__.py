"""From data to a checkpoint: curate, tokenize, pack, train, evaluate."""
