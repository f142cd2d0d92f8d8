"""What `ancestral certify` grades: identities, orders, and how near samples come to laws that are known exactly."""

from ancestral.measure.certification import certificate, certify

__all__ = ["certificate", "certify"]
