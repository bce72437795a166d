// Package config reads belayd's configuration: one TOML file and drop-ins,
// strictly. A key that is not known is an error that names the key, the file
// and the line.
package config
