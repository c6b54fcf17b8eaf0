"""Whose requests reach S3: the link of the credential chain, and at AWS the ARN. No key goes out of here."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from botocore.config import Config
from botocore.credentials import Credentials, RefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session

from streamswav.config import StorageSection
from streamswav.stream.store.remote import explain
from streamswav.stream.store.retry import IdentityError

STS_SECONDS = 3.0

_LINKS = {
    "env": "the environment (AWS_ACCESS_KEY_ID)",
    "shared-credentials-file": "the file of shared credentials",
    "config-file": "the AWS configuration file",
    "assume-role": "a role of the AWS configuration file",
    "assume-role-with-web-identity": "a web identity (IRSA)",
    "container-role": "the container's agent (Pod Identity, ECS)",
    "iam-role": "the instance's role",
    "sso": "single sign-on",
}
CREDENTIALS = "AWS credentials"
"""What an error about them names in place of a URL."""
_UNKNOWN_KEYS = ("InvalidClientTokenId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidIdentityToken")


@dataclass(frozen=True)
class Identity:
    """Whose requests these are.

    Attributes:
        link: of the credential chain that gave the credentials, in words.
        arn: what AWS calls it; None: AWS was not asked, or did not answer.
        silence: why it did not.
        expires: they are temporary, and nobody renews them.
    """

    link: str
    arn: str | None = None
    silence: str = ""
    expires: bool = False


def find_identity(section: StorageSection) -> Identity:
    """Walk the credential chain as a run does, and ask AWS whose credentials these are.

    Servers other than AWS have nobody to ask.

    Raises:
        DeniedError: there are no credentials, or AWS does not take them.
    """
    if section.anonymous:
        return Identity("nobody: requests are not signed (storage.anonymous)")
    session = Session()
    try:
        credentials = session.get_credentials()
        if credentials is None:
            reason = "none were found in any link of the chain (environment, files, roles)"
            raise IdentityError(CREDENTIALS, reason)
        credentials.get_frozen_credentials()
    except (BotoCoreError, ClientError, OSError) as error:
        raise _denied(error) from None
    link = _LINKS.get(credentials.method, credentials.method)
    identity = Identity(link, expires=_expires(credentials))
    if section.endpoint_url is not None:
        return identity
    try:
        return Identity(link, _ask(session, section), expires=identity.expires)
    except (BotoCoreError, ClientError, OSError) as error:
        if isinstance(error, ClientError) and error.response["Error"]["Code"] in _UNKNOWN_KEYS:
            code = error.response["Error"]["Code"]
            raise IdentityError(CREDENTIALS, f"those of {link} are not taken by AWS ({code})") from None
        return Identity(
            link, silence=str(getattr(explain(CREDENTIALS, error), "reason", error)), expires=identity.expires
        )


def _expires(credentials: Credentials) -> bool:
    return bool(credentials.token) and not isinstance(credentials, RefreshableCredentials)


def _ask(session: Session, section: StorageSection) -> str:
    region = section.region or session.get_config_variable("region") or "us-east-1"
    patience = Config(
        connect_timeout=STS_SECONDS, read_timeout=STS_SECONDS, retries={"total_max_attempts": 1}
    )
    with closing(session.create_client("sts", region_name=region, config=patience)) as client:
        arn: str = client.get_caller_identity()["Arn"]
    return arn


def _denied(error: Exception) -> IdentityError:
    explained = explain(CREDENTIALS, error)
    return IdentityError(CREDENTIALS, f"they cannot be had ({getattr(explained, 'reason', explained)})")
