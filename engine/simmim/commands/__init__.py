"""What each command of `simmim` reads from its command line; one file per command."""
