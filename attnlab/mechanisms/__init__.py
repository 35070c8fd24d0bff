"""One file is one mechanism; the file name is its key in configs (`attention=NAME`)."""
