"""Which URLs webhooks may call."""

import asyncio
import re
from datetime import UTC, datetime

import pytest

from tasks.contract.errors import ConfigurationError, InvalidRequestError
from tasks.contract.settings import Settings, get_settings
from tasks.maintenance.targets import check_url
from tasks.maintenance.webhooks import Sender, check_webhook

SECRET = f"whsec_{'A' * 32}"


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "017700000001",
            "127。0。0。1",
        ),
        *("localhost", "LOCALHOST", "0.0.0.0", "0", "10.0.0.1", "172.16.0.1"),
        *("192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]"),
        *("[::ffff:7f00:1]", "[::ffff:10.0.0.1]", "[::127.0.0.1]", "[fe80::1]", "[fd00:ec2::254]"),
        *("[fec0::1]", "[ff02::1]", "[2001:db8::1]", "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]"),
        *("192.0.0.8", "192.0.0.192", "192.88.99.1", "198.18.0.1", "198.19.255.255"),
        *("[3fff::1]", "[2001:20::1]", "[64:ff9b::c000:8]", "[5f00::1]"),
        *("[64:ff9b:1::1]", "[2002:7f00:1::]", "[2002:a00:1::1]", "[2001:0:7f00:1::]"),
    ],
)
def test_private_addresses_are_refused_in_every_spelling(host: str) -> None:
    for port in ("", ":8080"):
        with pytest.raises(InvalidRequestError, match="not public") as refused:
            check_url(f"http://{host}{port}/hook", Settings())
    assert refused.value.param == "webhook"
    check_url(f"http://{host}/hook", Settings(webhook_allow_private=True))


@pytest.mark.parametrize(
    "url",
    [
        *("https://8.8.8.8/hook?a=b#c", "http://1.1.1.1:8080", "https://[2606:4700::1111]/"),
        *("http://[::ffff:8.8.8.8]", "http://[64:ff9b::808:808]", "http://[2002:808:808::1]"),
        *("https://unknown.invalid/hook", f"http://{'a' * 64}/", "http://a..b/"),
    ],
)
def test_public_and_unknown_hosts_are_accepted(url: str) -> None:
    check_webhook(url, Settings(webhook_secrets=SECRET))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        *((url, "must begin with") for url in ("ftp://8.8.8.8/", "8.8.8.8", "//8.8.8.8/", "")),
        *((url, "must begin with") for url in ("http://", "http:///hook", "file:///etc/passwd")),
        *((f"http://{user}@8.8.8.8/", "credentials") for user in ("u", "u:p", ":p", "8.8.4.4\\")),
        *((f"http://8.8.8.8/{c}", "control characters") for c in "\0\r\n\t \x7f\x85\u2028\u202e"),
        *((f"http://8.8.8.8:{port}/", "port") for port in ("0", "65536", "99999", "x", "-1")),
        ("http://8.8.8.8/" + "a" * 2000, "longer than 2,000 characters"),
        ("http://0177.0.0.1/", "cannot be read"),
        ("http://[::1/", "cannot be read"),
        ("http://①②⑦.0.0.1/", "cannot be read"),
    ],
)
@pytest.mark.parametrize("allow_private", [False, True])
def test_urls_that_are_no_plain_http_are_refused(
    url: str, reason: str, allow_private: bool
) -> None:
    with pytest.raises(InvalidRequestError, match=f"(?i){reason}"):
        check_url(url, Settings(webhook_allow_private=allow_private))
    assert re.search(f"(?i){reason}", error_of(url, allow_private))


def error_of(url: str, allow_private: bool = False, **settings: str) -> str:
    """The error of a call, not of the check before it."""
    sender = Sender(
        Settings(webhook_secrets=SECRET, webhook_allow_private=allow_private, **settings)
    )
    call = sender.send("evt_1", url, b"{}", datetime.now(UTC))
    return str(asyncio.run(call).error)


@pytest.mark.parametrize(
    ("ports", "url", "port"),
    [
        *(("80, 443, 8000-8999", f"http://8.8.8.8:{p}/", p) for p in (22, 81, 7999, 9000, 6379)),
        ("443", "http://8.8.8.8/", 80),
        ("80", "https://8.8.8.8/", 443),
        ("8080", "http://8.8.8.8:8081/", 8081),
    ],
)
def test_ports_are_called_only_by_setting(ports: str, url: str, port: int) -> None:
    settings = Settings(webhook_ports=ports)
    sentence = f"port {port} is not allowed; use one of {ports}, .*SLUICE_WEBHOOK_PORTS"
    with pytest.raises(InvalidRequestError, match=sentence):
        check_url(url, settings)
    assert re.search(sentence, error_of(url, webhook_ports=ports))
    check_url(url, Settings(webhook_ports=f"{ports},{port}"))


@pytest.mark.parametrize("url", ["http://8.8.8.8:80", "https://8.8.8.8:443", "http://8.8.8.8:8999"])
def test_the_usual_ports_are_allowed(url: str) -> None:
    check_url(url, Settings())


@pytest.mark.parametrize("bad", ["", " , ", "x", "0", "65536", "1-", "-1", "9-8", "80;81", "٨٠"])
def test_bad_ports_stop_the_program(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_WEBHOOK_PORTS", bad)
    with pytest.raises(ConfigurationError, match=r"SLUICE_WEBHOOK_PORTS=.*8000-8999"):
        get_settings.__wrapped__()
