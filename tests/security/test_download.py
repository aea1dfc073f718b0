"""The downloader contains every attack of a hostile web server, and what it passes on is nothing but pixels."""

from __future__ import annotations

import datetime
import io
import random
import resource
import ssl
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from PIL import Image

from replay.record import Blob
from tests.security import bad_pictures as bad
from tests.security.hostile_web import Web, reply, sends
from tests.security.web_attacks import ATTACKS, MAX_BYTES, Attack, contained, downloader
from tools import download
from tools.download import LONGEST_SIDE, clean
from tools.fetch import Unreachable, public

_SPECIAL = """
0.0.0.0 10.1.2.3 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.255 169.254.169.254 172.16.0.1 172.31.255.255
192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1
239.255.255.255 240.0.0.1 255.255.255.255 168.63.129.16 :: ::1 ::127.0.0.1 ::ffff:8.8.8.8 ::ffff:127.0.0.1
64:ff9b::8.8.8.8 64:ff9b:1::1 100::1 2001::1 2001:10::1 2001:20::1 2001:db8::1 2002:808:808::1 3fff::1 fc00::1
fd00:ec2::254 fe80::1 fec0::1 ff02::1 4000::1
"""
SPECIAL = _SPECIAL.split()


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    server = Web()
    server.behaviours["honest"] = sends(bad.picture)
    yield server
    server.close()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_attack_is_contained_and_the_next_call_works(attack: Attack, web: Web) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert contained(attack, web) is None
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 400, f"memory grew by {grown:.0f} MiB"
    assert downloader().picture(web.url("honest")).mime == "image/png"
    until = time.monotonic() + 3
    while (left := [t.name for t in threading.enumerate() if t.name == "resolve"]) and time.monotonic() < until:
        time.sleep(0.02)
    assert left == []


def test_every_attack_has_a_name_of_its_own_and_there_are_enough() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 25


def test_a_flood_takes_no_more_memory_than_a_body_may_have(web: Web) -> None:
    flood = next(a for a in ATTACKS if a.name == "a body without end")
    tracemalloc.start()
    try:
        assert contained(flood, web) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * MAX_BYTES


@pytest.mark.parametrize("address", SPECIAL)
def test_addresses_for_special_purposes_are_not_public(address: str) -> None:
    assert not public(ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "172.15.0.1", "100.63.0.1", "208.80.154.224", "2620:0:861::1"])
def test_other_addresses_are_public(address: str) -> None:
    assert public(ip_address(address))


def test_python_calls_no_address_private_that_is_public_here() -> None:
    dice = random.Random(0)
    drawn = [ip_address(dice.getrandbits(32)) for _ in range(20_000)]
    drawn += [ip_address(0b001 << 125 | dice.getrandbits(125)) for _ in range(20_000)]
    assert [a for a in drawn if public(a) and (a.is_private or a.is_multicast or a.is_reserved)] == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_comes_upright_and_without_metadata(kind: str, orientation: int) -> None:
    blob = clean(bad.located_photo(kind, orientation))
    image = Image.open(io.BytesIO(blob.data))
    assert image.size == ((64, 48) if orientation < 5 else (48, 64))
    assert not image.getexif() and "icc_profile" not in image.info and b"Secret" not in blob.data
    assert blob.mime == Image.MIME[kind]


def test_a_large_picture_comes_smaller_and_a_palette_keeps_its_transparency() -> None:
    assert max(Image.open(io.BytesIO(clean(bad.picture("JPEG", (5000, 3000))).data)).size) == LONGEST_SIDE
    buffer = io.BytesIO()
    Image.new("P", (20, 20)).save(buffer, "GIF", transparency=0)
    assert Image.open(io.BytesIO(clean(buffer.getvalue()).data)).getpixel((0, 0))[3] == 0  # type: ignore[index]


def test_few_pictures_are_decoded_at_once_and_the_others_wait_or_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = [0], [0]

    def slow(image: Image.Image) -> Blob:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        running[0] -= 1
        return Blob(b"pixels")

    monkeypatch.setattr(download, "_pixels", slow)
    data = bad.picture()
    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(clean, [data] * 8))) == 8
    assert most[0] == download.AT_ONCE
    monkeypatch.setattr(download, "ROOM_S", 0.01)
    with ThreadPoolExecutor(8) as threads:
        failures = [job.exception() for job in [threads.submit(clean, data) for _ in range(8)]]
    assert {str(failure) for failure in failures if failure} == {"too many pictures are being decoded"}


def test_sixteen_bits_of_grey_are_brought_to_eight() -> None:
    buffer = io.BytesIO()
    Image.new("I;16", (20, 20), 128 * 256).save(buffer, "PNG")
    assert Image.open(io.BytesIO(clean(buffer.getvalue()).data)).getpixel((0, 0)) == (128, 128, 128)


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, ssl.SSLContext]]:
    """The port of a TLS server that calls itself pictures.example, and a context that believes it."""
    folder = tmp_path_factory.mktemp("tls")
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pictures.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM)
    (folder / "cert.pem").write_bytes(pem)
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Host"].startswith("pictures.example:")
            self.wfile.write(reply(bad.picture()))

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, ssl.create_default_context(cadata=pem.decode())
    server.shutdown()
    server.server_close()


def test_the_address_is_pinned_and_the_certificate_is_that_of_the_name(certified: tuple[int, ssl.SSLContext]) -> None:
    port, tls = certified
    here = downloader(lookup=lambda host: ["127.0.0.1"], tls=tls)
    assert here.picture(f"https://pictures.example:{port}/").mime == "image/png"
    with pytest.raises(Unreachable, match="certificate"):
        here.picture(f"https://bank.example:{port}/")


def test_a_certificate_of_nobody_is_not_believed(certified: tuple[int, ssl.SSLContext]) -> None:
    with pytest.raises(Unreachable, match="certificate"):
        downloader(lookup=lambda host: ["127.0.0.1"]).picture(f"https://pictures.example:{certified[0]}/")
