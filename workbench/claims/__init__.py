"""The claims ledger: rules written before the runs that they judge, evidence from stored runs, and verdicts.

rules reads the ledger's file; evidence and trained find the stored runs; measures computes one number for each run;
verdicts judges; shown is how readers see the result.
"""
