SOURCE_COLUMN = "data_source"
