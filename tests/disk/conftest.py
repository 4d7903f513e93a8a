from two_users import as_user, shared

__all__ = ["as_user", "shared"]
