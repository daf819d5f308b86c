"""Adapters: small trained matrices beside the frozen linears of any part."""
