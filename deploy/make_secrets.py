"""Writes the secrets of docker-compose.yml, once: `make secrets DOMAIN=llm.example.com`.

Each is a file of its own in `secrets/`, which only its owner can read. What is there stays; delete
a file (and those made of it) to have it written anew. Standard library and `openssl` only.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
# Where docker-compose.yml keeps what outlives its containers.
DATA = (
    *("redis", "postgres", "models", "prometheus", "alertmanager", "grafana"),
    # A models.yaml, where one is wanted; large bodies on their way.
    *("config", "nginx"),
)
# What the exporter of Redis may ask: figures, and nothing that jobs hold.
ASK = "+ping +info +config|get +slowlog|len +latency|latest +latency|histogram +client|setname"
# The user of our images. Without capabilities a container of root's cannot become who it has to be.
OWNER_FOR_ROOT = "10001:10001"
# What is made of which secret.
FORMS = {
    "postgres_password": ["database_url"],
    "redis_password": ["redis_users", "redis_url"],
    "redis_exporter_password": ["redis_users", "redis_exporter"],
}
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


class ConflictError(Exception):
    """What is there already does not belong together, or not to what is asked for."""


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

    def refuse_strays(self) -> None:
        """Refuses forms of a secret that is gone or another one: some part would be refused.

        Raises:
            ConflictError: it names them.
        """
        for name, forms in FORMS.items():
            secret = self.directory / name
            shown = secret.read_text().strip() if secret.exists() else ""
            if strays := [form for form in forms if not self._holds(form, shown)]:
                raise ConflictError(
                    f"secrets/{name} is {'another one' if shown else 'gone'}, and what was made of "
                    f"it is still there: delete {_paths(strays)}, too"
                )
        if not (self.directory / "ca").exists() and (self.directory / "redis_certificate").exists():
            redis, nginx = ([f"{name}_certificate", f"{name}_key"] for name in ("redis", "tls"))
            raise ConflictError(
                "secrets/ca is gone, and what it has signed is still there: delete "
                f"{_paths(redis)}, too (as well as {_paths(nginx)}, unless from elsewhere)"
            )

    def _holds(self, form: str, secret: str) -> bool:
        """Whether the form is of that secret; one that is not there will be."""
        path = self.directory / form
        if not path.exists():
            return True
        text = path.read_text()
        return bool(secret) and (secret in text or quote(secret, safe="") in text)

    def refuse_other_domain(self, domain: str) -> None:
        """Refuses a certificate of nginx with which clients could not call it by that name.

        Raises:
            ConflictError: it says what to delete.
            CalledProcessError: it is no certificate.
        """
        if not (self.directory / "tls_certificate").exists():
            return
        check = "-checkip" if _is_address(domain) else "-checkhost"
        said = self._openssl("x509", "-in", "tls_certificate", "-noout", check, domain)
        if "NOT match" in said:
            raise ConflictError(
                f"secrets/tls_certificate is not for {domain}: put one there that is, or delete "
                f"{_paths(['tls_certificate', 'tls_key'])} to have our own authority sign another"
            )

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
            named = f"IP:{host}" if _is_address(host) else f"DNS:{host}"
            names = ", ".join(dict.fromkeys((named, "DNS:localhost", "IP:127.0.0.1")))
            config.write_text(REQUEST.format(name=host, names=names))
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

    def _openssl(self, *arguments: str) -> str:
        done = subprocess.run(
            ["openssl", *arguments],
            cwd=self.directory,
            check=True,
            capture_output=True,
            text=True,
            umask=0o077,
        )
        return str(done.stdout)


def _paths(names: list[str]) -> str:
    return " and ".join(f"secrets/{name}" for name in names)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def read_env(root: Path) -> dict[str, str]:
    """What .env sets; nothing if it is not there."""
    env = root / ".env"
    lines = env.read_text().splitlines() if env.exists() else []
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def write_env(root: Path, **known: str) -> bool:
    """.env out of .env.example, with what is known; whether it was not there."""
    env = root / ".env"
    if env.exists():
        return False
    lines = (ROOT / ".env.example").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines]
    filled = [
        f"{name}={known[name]}" if name in known else line
        for name, line in zip(names, lines)  # noqa: B905 (any Python may run this)
    ]
    env.write_text("\n".join(filled) + "\n")
    return True


def give_to(owner: str, root: Path) -> None:
    """Has the containers' user own what root has made here."""
    user, _, group = owner.partition(":")
    for top in (root / "secrets", root / "data"):
        for path in (top, *top.iterdir()):
            os.chown(path, int(user), int(group or user))


def make(domain: str, root: Path) -> list[str]:
    """Writes what is missing; returns its names.

    Raises:
        ConflictError: what is there would not work with it.
        CalledProcessError: openssl failed.
        OSError: a file cannot be read or written.
    """
    env = read_env(root)
    domain = domain or env.get("DOMAIN") or "localhost"
    if env.get("DOMAIN", domain) != domain:
        raise ConflictError(f"DOMAIN={env['DOMAIN']} in .env: to have {domain}, set it there first")
    is_root = os.getuid() == 0
    owner = env.get("OWNER", OWNER_FOR_ROOT if is_root else f"{os.getuid()}:{os.getgid()}")
    if owner.partition(":")[0] in {"0", "root"}:
        raise ConflictError(
            f"OWNER={owner} in .env: containers without capabilities do not work as root; "
            f"set OWNER={OWNER_FOR_ROOT} there, and `chown -R {OWNER_FOR_ROOT} secrets data`"
        )
    written = Secrets(root / "secrets")
    written.refuse_strays()
    written.refuse_other_domain(domain)
    written.write_passwords()
    written.write_certificates(domain)
    for name in DATA:
        (root / "data" / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    if is_root:
        give_to(owner, root)
    if write_env(root, DOMAIN=domain, OWNER=owner):
        written.new.append("../.env")
    return written.new


def main(domain: str, root: Path = ROOT) -> None:
    """Writes what is missing, and reports it by name; without a domain it is the one in .env."""
    if not shutil.which("openssl"):
        sys.exit("sluice: no openssl here, which makes the certificates; install it")
    try:
        new = make(domain, root)
    except ConflictError as conflict:
        sys.exit(f"sluice: {conflict}; then `make secrets` again")
    except subprocess.CalledProcessError as failed:
        sys.exit(f"sluice: `{' '.join(failed.cmd)}` failed: {failed.stderr.strip()}")
    except OSError as refused:
        sys.exit(f"sluice: cannot use {refused.filename} ({refused.strerror}); run it as its owner")
    print(f"sluice: {root / 'secrets'}: {', '.join(new) or 'nothing was missing'}")


if __name__ == "__main__":
    main("".join(sys.argv[1:]))
