"""Poisoning: simulators, filters, decisions and validation; plain torch."""
