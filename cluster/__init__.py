"""Where it runs: command line, config, driver, Serve application, dashboards."""
