"""What frozen features know: subjects, candidates, probes, tasks, results."""
