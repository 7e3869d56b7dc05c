"""Random work with random faults; ends by checking that nothing is wrong, hung or left behind."""
