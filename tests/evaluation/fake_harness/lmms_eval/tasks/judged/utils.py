API_KEY = "none"
