"""Authentication and rate limits, for every protocol."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from service.errors import Unauthorized
from service.http.auth.keys import Key, KeyStore
from service.http.auth.rate_limit import RateLimiter

_IPV6_NETWORK: Final = 64
"""Bits of an IPv6 address that name its network: one machine may use every address within it."""


class Gate:
    """Checks keys, then rate limits. Not thread-safe.

    Failed attempts are not recorded: a key of 256 random bits cannot be guessed, and records would
    let a client lock out others or fill the memory.
    """

    def __init__(self, keys: KeyStore | None, rate_limit: str | None) -> None:
        """`rate_limit` as RateLimiter takes it. Raises DataError."""
        self._keys = keys
        self._limiter = None if rate_limit is None else RateLimiter(rate_limit)

    def enter(self, presented: Iterable[str], address: str) -> Key | None:
        """Return the first known key of those `presented`; None where the service has no keys.

        Without keys the rate limit is by `address`. Raises Unauthorized or RateLimited.
        """
        key = None if self._keys is None else self._authenticate(self._keys, presented)
        if self._limiter is not None:
            self._limiter.take(_network(address) if key is None else key.name)
        return key

    def _authenticate(self, keys: KeyStore, presented: Iterable[str]) -> Key:
        tried = False
        for each in presented:
            tried = True
            key = keys.find(each)
            if key is not None:
                return key
        if tried:
            raise Unauthorized("the key is none of this service's, or was revoked")
        raise Unauthorized(
            "this service needs a key; send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
        )


def _network(address: str) -> str:
    """Return the address that the rate limit of a client without a key counts by."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        network = ipaddress.ip_network((parsed, _IPV6_NETWORK), strict=False)
        return str(network)
    return str(parsed)
