"""One file is one way to tell positions apart; the file name is its key (`position=NAME`)."""
