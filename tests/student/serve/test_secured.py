"""A service with a key and a certificate, as it may listen where others reach it."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import httpx
import openai
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.base.errors import UserError
from pipeline.cli.main import main
from tests.student.serve.conftest import FakeAnswerer, Serve

KEY = {"Authorization": "Bearer open sesame"}


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    certificate, private = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    return certificate, private


def test_who_has_no_key_gets_no_answer(serve: Serve, fake: FakeAnswerer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDENT_KEY", "open sesame")
    with serve(fake, key="STUDENT_KEY") as client:
        for path in ("/task", "/metrics", "/openapi.json", "/v1/models", "/nowhere"):
            refused = client.get(path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert "sesame" not in refused.text
        assert client.post("/classify", json={"text": "fine"}, headers={"Authorization": "Bearer guess"}).status_code == 401
        assert not fake.batches
        assert client.get("/").status_code == client.get("/healthz").status_code == 200
        assert client.post("/classify", json={"text": "fine"}, headers=KEY).json()["results"][0]["source"] == "student"
        theirs = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="open sesame", max_retries=0)
        said = theirs.chat.completions.create(model="student", messages=[{"role": "user", "content": "fine"}])
        assert "good" in str(said.choices[0].message.content)


def test_it_speaks_https(serve: Serve, fake: FakeAnswerer, tmp_path: Path) -> None:
    certificate, private = self_signed(tmp_path)
    with serve(fake, certificate=str(certificate), private_key=str(private)) as client:
        url = f"https://localhost:{client.base_url.port}/classify"
        with httpx.Client(verify=ssl.create_default_context(cafile=str(certificate))) as safe:
            assert safe.post(url, json={"text": "fine"}).json()["results"][0]["source"] == "student"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.post(url, json={"text": "fine"})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("serve.certificate=nowhere.pem", "cannot speak HTTPS with nowhere.pem: No such file"),
        ("serve.private_key=nowhere.pem", "private_key needs its certificate"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, setting: str, message: str) -> None:
    done = CliRunner().invoke(main, ["serve", "--out", str(tmp_path), "--port", "0", "--set", setting])
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")


def test_a_key_that_is_not_in_the_environment(serve: Serve, fake: FakeAnswerer) -> None:
    with pytest.raises(UserError, match="the environment variable NOBODYS holds no key"), serve(fake, key="NOBODYS"):
        pass
