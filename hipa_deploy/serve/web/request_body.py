"""From the bytes of a request to its checked fields and uploaded files."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from hipa_deploy.serve.service import GoneError
from hipa_deploy.serve.web.api_errors import ApiError, validation_error
from hipa_deploy.serve.web.request_log import log

Fields = TypeVar("Fields", bound=BaseModel)

_FORM_FIELDS = 40
_FORM_FIELD_BYTES = 1 << 19  # a prompt of 100,000 characters in UTF-8 fits


async def json_fields(request: Request, kind: type[Fields]) -> Fields:
    """The fields of a JSON request.

    Raises:
        ApiError: another content type, no JSON, or wrong fields.
        GoneError: the client went away.

    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(
            415, "Expected the header Content-Type: application/json.", "unsupported_content_type"
        )
    try:
        content = await request.body()
    except ClientDisconnect:
        raise GoneError from None
    try:
        data = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "The request is not valid JSON.", "invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "Expected a JSON object.", "invalid_json")
    try:
        return kind.model_validate(data, strict=True)
    except ValidationError as error:
        raise validation_error(error) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are Python's additions to JSON


class Form:
    """A form with files; closes its temporary files at the end of the block.

    Args:
        request: whose body is read.
        files: names that a file may have in it.

    Raises:
        ApiError: no such form, a file of another name, or one that there is no space for.

    """

    def __init__(self, request: Request, files: Sequence[str]) -> None:
        self._request = request
        self._names = files
        self._data: Any = None

    async def __aenter__(self) -> Form:
        kind = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise ApiError(
                415,
                "Expected a form: Content-Type: multipart/form-data.",
                "unsupported_content_type",
            )
        parser = MultiPartParser(
            self._request.headers,
            self._request.stream(),
            max_files=20,
            max_fields=_FORM_FIELDS,
            max_part_size=_FORM_FIELD_BYTES,
        )
        try:
            self._data = await parser.parse()
        except ClientDisconnect:
            raise GoneError from None
        except ApiError:
            raise
        except (MultiPartException, ValueError, KeyError, UnicodeError, LookupError):
            raise ApiError(400, "The form cannot be read.", "invalid_form") from None
        except OSError as error:
            # A file of more than 1 MiB is kept in the system's folder for such files.
            log(
                "upload cannot be kept",
                logging.ERROR,
                reason=str(error),
                remedy=f"free some space in {tempfile.gettempdir()}, or set TMPDIR",
            )
            raise ApiError(
                500, "The upload cannot be kept. The service's log says why.", "upload_failed"
            ) from None
        return self

    async def __aexit__(self, *error: object) -> None:
        for _, value in self._data.multi_items():
            if isinstance(value, UploadFile):
                with suppress(OSError):
                    await value.close()

    def fields(self, kind: type[Fields]) -> Fields:
        """The fields that are no files.

        Raises:
            ApiError: a field is wrong, unknown, there twice, or text in place of a file.

        """
        data: dict[str, str] = {}
        for name, value in self._data.multi_items():
            if isinstance(value, UploadFile):
                continue
            if name in self._names:
                # What curl sends where the sign @ was forgotten.
                raise ApiError(
                    400,
                    f"{name}: got text. Expected a file; with curl: -F {name}=@FILE.",
                    "invalid_value",
                    param=name,
                )
            if name in data:
                raise ApiError(400, "A field is there twice.", "invalid_value", param=name[:100])
            data[name] = value
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            raise validation_error(error) from None

    def file(self, *names: str, required: bool = False) -> Any:
        """The one file of one of these names, as a binary file; None without one.

        Raises:
            ApiError: several, or none where one is required.

        """
        found = []
        for name, value in self._data.multi_items():
            if not isinstance(value, UploadFile):
                continue
            if name not in self._names:
                raise ApiError(
                    400, "Unknown file in the form.", "unknown_parameter", param=name[:100]
                )
            if name in names:
                found.append(value.file)
        if len(found) > 1:
            raise ApiError(
                400,
                f"Got {len(found)} files. This service takes one.",
                "invalid_value",
                param=names[0],
            )
        if required and not found:
            raise ApiError(
                400,
                f"Missing required file: {names[0]!r}.",
                "missing_required_parameter",
                param=names[0],
            )
        return found[0] if found else None
