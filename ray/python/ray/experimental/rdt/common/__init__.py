"""What every other folder uses: settings, errors, threads, clocks."""
