"""What a run tells its reader: the report, the model card, generated tables of the documentation."""
