"""One file is one way to turn logits into weights; the file name is its key (`normaliser=NAME`)."""
