"""The checkpoint room: models and states on disk, and the pickles of others, read without running them."""
