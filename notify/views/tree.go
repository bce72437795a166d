package views

import "strings"

// tree is a hierarchy of values, as GCE and EC2 have it: its leaves, those of a
// folder next to each other.
type tree []leaf

type leaf struct {
	path  string // "scheduling/preemptible"
	value func() any
}

func (t *tree) add(path string, value func() any) { *t = append(*t, leaf{path, value}) }

func (t *tree) text(path, value string) { t.add(path, func() any { return value }) }

// leaf finds a value.
func (t tree) leaf(path string) (value any, there bool) {
	for _, l := range t {
		if l.path == path {
			return l.value(), true
		}
	}
	return nil, false
}

// list names what is directly in a folder ("" or "scheduling/"), folders with a
// slash at the end; nil: there is no such folder.
func (t tree) list(folder string) (names []string) {
	for _, l := range t {
		rest, within := strings.CutPrefix(l.path, folder)
		if !within {
			continue
		}
		if i := strings.IndexByte(rest, '/'); i >= 0 {
			rest = rest[:i+1]
		}
		if len(names) == 0 || names[len(names)-1] != rest {
			names = append(names, rest)
		}
	}
	return names
}

// folder is the name under which a path without a slash at its end is listed.
func folder(path string) string {
	if path == "" || strings.HasSuffix(path, "/") {
		return path
	}
	return path + "/"
}
