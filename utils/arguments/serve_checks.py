"""Checks of the server's options: ports, who may ask, and the names under which models are served."""

from __future__ import annotations

import errno
import functools
import importlib.util
import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

from utils.arguments.checks import adapter_folder
from utils.parallel.topology import Layout
from utils.splits import looks_like_path

KEY_VARIABLE = "LLM_API_KEY"
LONGEST_NAME = 200
Address = tuple[socket.AddressFamily, tuple[Any, ...]]


# --- ports and addresses -------------------------------------------------------------------------


def ports(run: Any) -> Iterator[str]:
    """The ports must differ and be free, on an address of this machine."""
    names = ("flask_port",) if run.no_ui else ("flask_port", "port")
    if len({getattr(run, name) for name in names}) < len(names):
        yield f"{run.where('port')} and {run.where('flask_port')} are the same; the page and the API need one each"
        names = ("flask_port",)
    if Layout.of_prediction().rank:
        return  # the first process listens, and may do so already
    addresses = _addresses(run.host)
    if not addresses:
        yield f"{run.where('host')}: no such address; 127.0.0.1 is this machine alone, 0.0.0.0 all its networks"
        return
    for name in names:
        yield from _not_free(run, name, addresses)


def _not_free(run: Any, name: str, addresses: tuple[Address, ...]) -> Iterator[str]:
    port = getattr(run, name)
    refused = {_refusal(family, (address[0], port, *address[2:])) for family, address in addresses}
    if errno.EADDRINUSE in refused:
        yield f"{run.where(name)} is in use; end what listens there, or choose another {name}"
    elif errno.EACCES in refused:
        yield f"{run.where(name)} is not for ordinary users; choose one from 1024 on"
    elif None not in refused and name == "flask_port":
        yield f"{run.where('host')} is no address of this machine; 127.0.0.1 and 0.0.0.0 always are"


def _refusal(family: socket.AddressFamily, address: tuple[Any, ...]) -> int | None:
    """The error that listening at an address gives, without listening; None if it would work."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an ended server's port may be taken at once
            probe.bind(address)
    except OSError as error:
        return error.errno
    return None


@functools.cache
def _addresses(host: str) -> tuple[Address, ...]:
    """What a host name or address stands for; nothing if it is unknown."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return ()
    return tuple((family, address) for family, _, _, _, address in found)


def is_own(host: str) -> bool:
    """Whether only this machine reaches what listens on a host."""
    addresses = _addresses(host)
    return bool(addresses) and all(ipaddress.ip_address(address[0]).is_loopback for _, address in addresses)


# --- who may ask ---------------------------------------------------------------------------------


def protection(run: Any) -> Iterator[str]:
    """What other machines reach has a key, or is open on purpose."""
    if (
        _addresses(run.host)
        and not is_own(run.host)
        and run.api_key is None
        and not run.insecure
        and run.api_key_file is None
    ):
        yield (
            f"{run.where('host')} lets other machines ask; set {KEY_VARIABLE} (or api_key) to a key that they must "
            "bring, or add --insecure"
        )


def key_in(file: str) -> str | None:
    """The key in the first line of a file; None if there is none."""
    try:
        with open(file, encoding="utf-8") as lines:
            return lines.readline().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def key(run: Any) -> Iterator[str]:
    """A key travels in a header, so it is of visible ASCII signs; no message shows it."""
    if run.api_key_file is not None:
        if "api_key" in run.provided:
            yield f"{run.where('api_key_file')} and api_key ({run.origin('api_key')}) exclude each other; keep one"
        elif run.api_key is None:
            yield f"{run.where('api_key_file')}: there is no key in its first line, or no such file"
            return
    if run.api_key is not None and not re.fullmatch(r"[!-~]+", run.api_key):
        place = KEY_VARIABLE if run.origin("api_key") == "default" else f"api_key ({run.origin('api_key')})"
        place = place if run.api_key_file is None else run.where("api_key_file")
        yield f"{place}: expected letters, digits and signs of ASCII without blanks, which a header can carry"


def origins(run: Any) -> Iterator[str]:
    """Origins are as browsers send them."""
    for origin in run.cors_origins:
        if origin != "*" and not re.fullmatch(r"https?://[^\s/?#@]+", origin):
            named = f"cors_origins ({run.origin('cors_origins')})"
            yield f'{named}: expected * or an origin such as https://chat.example.org, without a path, found "{origin}"'


def page(run: Any) -> Iterator[str]:
    if not run.no_ui and importlib.util.find_spec("gradio") is None:
        yield f"the page on {run.where('port')} needs gradio: pip install gradio, or add --no_ui"


# --- names ---------------------------------------------------------------------------------------


def name_of(model: str) -> str:
    """The name under which a model is served by default: of a folder the last part, else as it is."""
    return os.path.basename(os.path.abspath(model)) if looks_like_path(model) else model


def names(run: Any) -> Iterator[str]:
    if run.served_model_name is not None and _is_no_name(run.served_model_name):
        yield f"{run.where('served_model_name')}: {_EXPECTED_NAME}"


_EXPECTED_NAME = f"expected 1 to {LONGEST_NAME} visible characters without blanks around them"


def _is_no_name(name: str) -> bool:
    return not name or len(name) > LONGEST_NAME or not name.isprintable() or name != name.strip()


def read_adapters(modules: list[str]) -> list[tuple[str, str]]:
    """(served name, folder) of each NAME=FOLDER; a ~ is the home folder. Ill-formed ones have an empty folder."""
    parts = (module.partition("=") for module in modules)
    return [(name.strip(), os.path.expanduser(folder.strip())) for name, _, folder in parts]


def adapters(run: Any) -> Iterator[str]:
    """The adapters beside the model are folders of adapters, each under a name of its own."""
    if not run.lora_modules:
        return
    origin = f"lora_modules ({run.origin('lora_modules')})"
    taken = {run.served_model_name}
    for module, (name, folder) in zip(run.lora_modules, read_adapters(run.lora_modules), strict=True):
        if not folder or not name:
            yield f'{origin}: expected NAME=FOLDER, found "{module}"'
            continue
        if _is_no_name(name):
            yield f'{origin}: "{name}": {_EXPECTED_NAME}'
        elif name in taken:
            yield f"{origin}: {name} is served already; give each model a name of its own"
        taken.add(name)
        yield from adapter_folder(f"{origin}: {module}", folder, "lora")
    for other in ("lora_path", "prefix_path"):
        if getattr(run, other) is not None:
            yield f"{origin} and {run.where(other)} exclude each other; serve that one as an adapter too"
    if run.mode == "static":
        yield f"{origin} and {run.where('mode')} exclude each other; an exported model has its adapter inside"
