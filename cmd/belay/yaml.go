package main

import (
	"fmt"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// toYAML writes JSON, which is YAML already but for its escapes, in block style
// with the same order and values. What a terminal would obey is escaped.
func toYAML(json []byte) (string, error) {
	var doc yaml.Node
	// The library reads control characters as escapes only, and knows no
	// surrogate pairs.
	text := escape(string(json), func(r rune) bool { return r == '\n' || r > 0xffff }, nil)
	if err := yaml.Unmarshal([]byte(text), &doc); err != nil {
		return "", err
	}
	restyle(&doc, regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9 ,()=+:_./-]*$`))
	var b strings.Builder
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	err := e.Encode(&doc)
	long := func(r rune) string { return fmt.Sprintf(`\U%08x`, r) }
	return escape(b.String(), func(r rune) bool { return r == '\n' }, long), err
}

// restyle takes the brackets off, and the quotes off texts that are harmless;
// where those need quotes after all, because they are words or numbers to
// YAML, the library puts them back. Other texts keep their double quotes:
// between those an escape means what it stands for.
func restyle(n *yaml.Node, harmless *regexp.Regexp) {
	if n.Kind != yaml.ScalarNode || harmless.MatchString(n.Value) {
		n.Style = 0
	}
	for _, child := range n.Content {
		restyle(child, harmless)
	}
}
