"""The gates of `tolaria.testing`, under the name that the tests here know them by."""

from tolaria.testing.gates import Gate, distinct_streams, gets_through

__all__ = ["Gate", "distinct_streams", "gets_through"]
