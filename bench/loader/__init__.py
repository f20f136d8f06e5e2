"""How fast images come to the step, beside what people use for it."""
