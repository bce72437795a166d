package update

import (
	"reflect"
	"strings"
)

// Settings are the names of all settings, as documentation is to have them.
func Settings() (names []string) {
	for _, t := range []reflect.Type{reflect.TypeFor[file](), reflect.TypeFor[change](), reflect.TypeFor[step](), reflect.TypeFor[artifact](), reflect.TypeFor[check]()} {
		for i := range t.NumField() {
			name, _, _ := strings.Cut(t.Field(i).Tag.Get("toml"), ",")
			names = append(names, name)
		}
	}
	return names
}
