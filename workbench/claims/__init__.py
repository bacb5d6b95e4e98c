"""The claims ledger: rules that are written before the runs they judge (rules), numbers of stored runs (evidence,
measures), and verdicts (verdicts)."""
