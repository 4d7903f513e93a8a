"""Files on the disk: the only part that writes whole or not at all, syncs, locks and names temporary files.

- ``write``: whole files and folders, and the error for a disk that refuses
- ``folders``: folders that are made, shared by a group and synced
- ``names``: temporary names, and what killed writers left under them
- ``lock``: locks between processes
- ``growing_file``: files that grow a whole line at a time, and wait for a full disk
- ``private``: folders and files that no other user can have changed
- ``block_file``: blocks that are changed in place (it needs numpy, so it is imported by itself)
"""

from nanothink.disk.folders import make_folder, new_folder, remove_empty, sync_folder, sync_tree
from nanothink.disk.growing_file import GrowingFile
from nanothink.disk.lock import HeldError, can_lock, held, hold_in_use, is_in_use, locked
from nanothink.disk.names import leftovers, remove, shown, sweep, sweep_folder, temporary_path
from nanothink.disk.private import is_safe, open_private, private_folder, user_folders
from nanothink.disk.write import (
    Explain,
    scratch_folder,
    storage_error,
    try_to_write,
    whole_file,
    whole_folder,
    write_whole,
)
