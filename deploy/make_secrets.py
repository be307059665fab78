"""Writes the secrets of docker-compose.yml, once: `make secrets DOMAIN=llm.example.com`.

Each is a file of its own in `secrets/`, which only its owner can read. What is there stays; delete
a file (and those made of it) to have it written anew. Standard library and `openssl` only.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where docker-compose.yml keeps what outlives its containers.
DATA = (
    *("redis", "postgres", "models", "prometheus", "alertmanager", "grafana"),
    # A models.yaml, where one is wanted; large bodies on their way.
    *("config", "nginx"),
)
# What the exporter of Redis may ask: figures, and nothing that jobs hold.
ASK = "+ping +info +config|get +slowlog|len +latency|latest +latency|histogram +client|setname"
CA_DAYS, CERTIFICATE_DAYS = 3650, 825
NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
REQUEST = """\
[req]
prompt = no
distinguished_name = name
x509_extensions = authority
[name]
CN = {name}
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""


class Secrets:
    """The files of one directory, each written if it is not there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.new: list[str] = []
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o700)

    def write(self, name: str, text: str) -> str:
        """Writes the text if the file is not there; returns what it holds."""
        path = self.directory / name
        if not path.exists():
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
            self.new.append(name)
        return path.read_text()

    def write_passwords(self) -> None:
        """What the parts show each other, and its forms that each of them reads."""
        self.write("admin_key", secrets.token_urlsafe(32))
        self.write("grafana_password", secrets.token_urlsafe(24))
        self.write("webhook_secrets", f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}")
        # Of the role `operator`; `sluice keys create` makes it once there is a database.
        self.write("prometheus_key", "")
        for role in ("admin", "exporter"):
            self.write(f"postgres_{role}", secrets.token_urlsafe(32))
        sql = self.write("postgres_password", secrets.token_urlsafe(32)).strip()
        self.write("database_url", f"postgresql+psycopg://sluice:{sql}@postgres:5432/sluice")
        password = self.write("redis_password", secrets.token_urlsafe(32)).strip()
        watching = self.write("redis_exporter_password", secrets.token_urlsafe(32)).strip()
        users = (
            f"user default on >{password} ~* &* +@all\nuser exporter on >{watching} -@all {ASK}\n"
        )
        self.write("redis_users", users)
        url = f"rediss://:{password}@redis:6379/0?ssl_ca_certs=/run/secrets/ca"
        self.write("redis_url", url)
        self.write("redis_exporter", json.dumps({"rediss://exporter@redis:6379": watching}))

    def write_certificates(self, domain: str, days: int = CERTIFICATE_DAYS) -> None:
        """An authority of our own; what it signs for Redis, and for nginx until there is better."""
        if not (self.directory / "ca").exists():
            self._certify("ca", "ca_key", "Sluice", CA_DAYS)
        for name, host in (("redis", "redis"), ("tls", domain)):
            if not (self.directory / f"{name}_certificate").exists():
                self._certify(f"{name}_certificate", f"{name}_key", host, days, is_signed=True)

    def _certify(
        self, certificate: str, key: str, host: str, days: int, *, is_signed: bool = False
    ) -> None:
        """A new key and its certificate, signed by `ca` or by itself."""
        with tempfile.TemporaryDirectory(dir=self.directory) as place:
            config, request = Path(place) / "config", Path(place) / "request"
            names = ", ".join(f"DNS:{name}" for name in dict.fromkeys((host, "localhost")))
            config.write_text(REQUEST.format(name=host, names=f"{names}, IP:127.0.0.1"))
            new = ["req", "-new", *NEW_KEY, "-keyout", key, "-config", str(config)]
            ends = ["-days", str(days), "-out", certificate]
            if not is_signed:
                self._openssl(*new, "-x509", *ends)
            else:
                self._openssl(*new, "-out", str(request))
                signed = ["x509", "-req", "-in", str(request), "-CA", "ca", "-CAkey", "ca_key"]
                signed += ["-set_serial", f"0x{secrets.token_hex(16)}"]
                self._openssl(*signed, "-extfile", str(config), "-extensions", "server", *ends)
        for name in (certificate, key):
            (self.directory / name).chmod(0o600)
            self.new.append(name)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments],
            cwd=self.directory,
            check=True,
            capture_output=True,
            text=True,
            umask=0o077,
        )


def write_env(root: Path, domain: str) -> bool:
    """.env out of .env.example, with this user and the domain; whether it was not there."""
    env = root / ".env"
    if env.exists():
        return False
    known = {"DOMAIN": domain, "OWNER": f"{os.getuid()}:{os.getgid()}"}
    lines = (ROOT / ".env.example").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines]
    filled = [
        f"{name}={known[name]}" if name in known else line
        for name, line in zip(names, lines)  # noqa: B905 (any Python may run this)
    ]
    env.write_text("\n".join(filled) + "\n")
    return True


def main(domain: str, root: Path = ROOT) -> None:
    """Writes what is missing, and reports it by name."""
    if not shutil.which("openssl"):
        sys.exit("sluice: no openssl here, which makes the certificates; install it")
    written = Secrets(root / "secrets")
    written.write_passwords()
    try:
        written.write_certificates(domain)
    except subprocess.CalledProcessError as failed:
        sys.exit(f"sluice: `{' '.join(failed.cmd)}` failed: {failed.stderr.strip()}")
    for name in DATA:
        (root / "data" / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    if write_env(root, domain):
        written.new.append("../.env")
    print(f"sluice: {written.directory}: {', '.join(written.new) or 'nothing was missing'}")


if __name__ == "__main__":
    main(sys.argv[1])
