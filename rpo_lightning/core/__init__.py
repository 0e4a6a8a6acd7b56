"""What every room uses: the records of an iteration, errors, files, hashes, seeds, ranks and times."""
