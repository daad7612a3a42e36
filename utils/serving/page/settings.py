"""What the page is told by environment variables: `flask_server.py` writes them, the process of the page reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from utils.errors import raise_if


@dataclass(frozen=True)
class PageSettings:
    """Where the page is and whom it asks.

    Attributes:
        api_url: of the HTTP API, such as http://127.0.0.1:8010.
        host, port: where the page listens.
        title: stands on the page.
        api_key: goes along with each request to the API; whoever opens the page has to know it. Empty: no key.
        parent: process number of the process that the page ends with; 0: with none.
    """

    api_url: str
    host: str = "127.0.0.1"
    port: int = 8011
    title: str = ""
    api_key: str = ""
    parent: int = 0

    def environment(self) -> dict[str, str]:
        """The variables that `from_environment` reads."""
        return {
            "LLM_PAGE_API_URL": self.api_url,
            "LLM_PAGE_HOST": self.host,
            "LLM_PAGE_PORT": str(self.port),
            "LLM_PAGE_TITLE": self.title,
            "LLM_PAGE_PARENT": str(self.parent),
            "LLM_API_KEY": self.api_key,
        }

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> PageSettings:
        """Reads the variables; those that are not set keep their defaults, but for LLM_PAGE_API_URL.

        Raises:
            UserError: no address of the API, or a port or process number that is no number.
        """
        faults = []
        if not variables.get("LLM_PAGE_API_URL"):
            faults.append("LLM_PAGE_API_URL is not set; it is the address of the API, such as http://127.0.0.1:8010")
        for name in ("LLM_PAGE_PORT", "LLM_PAGE_PARENT"):
            if not variables.get(name, "0").isdecimal():
                faults.append(f"{name} is {variables[name]!r}; a number is expected")
        raise_if(faults)
        return cls(
            api_url=variables["LLM_PAGE_API_URL"].rstrip("/"),
            host=variables.get("LLM_PAGE_HOST", cls.host),
            port=int(variables.get("LLM_PAGE_PORT", cls.port)),
            title=variables.get("LLM_PAGE_TITLE", cls.title),
            api_key=variables.get("LLM_API_KEY", cls.api_key),
            parent=int(variables.get("LLM_PAGE_PARENT", cls.parent)),
        )
