"""The report's figures as plain data for plotly.js; colours are CSS variables, so that they are all in one place."""
