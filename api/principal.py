"""Who sends a request: whose it is, and what it may ask for."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tasks.contract.access import DEFAULT_TENANT, Role
from tasks.contract.errors import (
    EndpointNotAllowedError,
    ModelNotAllowedError,
    ModelNotFoundError,
    PermissionDeniedError,
)
from tasks.contract.models import Catalog, Model
from tasks.queue.limits import Limited


@dataclass(frozen=True, slots=True)
class Principal:
    """A key that was accepted, or whoever there is while no key is needed."""

    tenant: str
    key_id: str
    """Empty: no key was needed."""
    roles: frozenset[Role]
    models: frozenset[str] | None = None
    """Names or aliases; None: all, as with the endpoints."""
    endpoints: frozenset[str] | None = None
    weight: float = 1.0
    """By which what its jobs cost counts less in the fair queue."""
    limits: Sequence[Limited] = field(default=(), hash=False)
    digest: str = field(default="", repr=False)
    """By which the key that was shown is looked up again."""

    def check_role(self, role: Role) -> None:
        """Admins have all roles.

        Raises:
            PermissionDeniedError: it has another one.
        """
        if self.roles.isdisjoint({role, Role.ADMIN}):
            raise PermissionDeniedError(
                f"This takes a key with the role {role}; an admin makes one with "
                f"`sluice keys create --role {role} NAME`."
            )

    def may_use(self, model: Model) -> bool:
        """Whether it is for that model, under whichever of its names."""
        return self.models is None or not self.models.isdisjoint({model.name, *model.aliases})

    def names(self, catalog: Catalog) -> dict[str, Model]:
        """The names and aliases that it may use."""
        return {name: model for name, model in catalog.names.items() if self.may_use(model)}

    def resolve(self, catalog: Catalog, name: str | None) -> Model:
        """The model of that name or alias, or the default.

        Raises:
            ModelNotFoundError: no model has that name.
            ModelNotAllowedError: it is for others.
        """
        try:
            model = catalog.resolve(name)
        except ModelNotFoundError:
            raise ModelNotFoundError(name or "", self.names(catalog)) from None
        if not self.may_use(model):
            raise ModelNotAllowedError(name or model.name)
        return model

    def check_endpoint(self, endpoint: str) -> None:
        """Refuses requests to that path.

        Raises:
            EndpointNotAllowedError: it is for others.
        """
        if self.endpoints is not None and endpoint not in self.endpoints:
            raise EndpointNotAllowedError(endpoint)


# While there is no key, and who is on this machine is the only one to reach the API.
ANYBODY = Principal(DEFAULT_TENANT, "", frozenset({Role.USER, Role.OPERATOR}))
