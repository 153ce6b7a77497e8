"""The commands of a client: submit, jobs, cancel and fetch, against a server elsewhere or here."""
