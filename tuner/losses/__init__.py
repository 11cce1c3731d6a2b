"""Pure torch functions that return sums; the caller divides by the global weight of the step."""
