"""What every room uses: the records that travel, errors, files, seeds, ranks, time."""
