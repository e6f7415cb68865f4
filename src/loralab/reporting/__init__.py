"""Records to tables, figures and one page; reads records only, never a live process."""
