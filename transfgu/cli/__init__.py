"""The command line that the jobs share."""
