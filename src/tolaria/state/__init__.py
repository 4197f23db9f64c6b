"""What is rolled back: the parts of a train state (`parts`), their tensors (`leaves`), global random state (`rng`)."""
