"""An experiment's folder: records, locks, files that are whole."""
