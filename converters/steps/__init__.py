"""The parts of a conversion, one job each: export, optimise, quantize, verify, measure."""
