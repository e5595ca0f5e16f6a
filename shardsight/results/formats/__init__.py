"""Results in the formats of other tools: a module a format, each with `write(samples, contents, target, report)`."""
