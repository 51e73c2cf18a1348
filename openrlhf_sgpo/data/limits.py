"""The limits of the data report, for those who call the readers of data themselves."""

from openrlhf_sgpo.config import DataLimits

__all__ = ["DataLimits"]
