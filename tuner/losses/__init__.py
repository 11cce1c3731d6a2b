"""Pure torch functions. Losses return sums, which the caller divides by the total weight of the step."""
